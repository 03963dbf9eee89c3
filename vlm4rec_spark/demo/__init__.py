"""A shop to try everything on: drawn photos, shoppers whose taste shows in the photos, and a model that describes them."""
