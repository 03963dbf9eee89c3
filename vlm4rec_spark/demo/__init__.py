"""A shop to try everything on: drawn photos, shoppers whose taste shows in them, and a model that describes them."""
