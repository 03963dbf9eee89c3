"""A shop to try everything on: drawn photos, and shoppers whose taste shows in them."""
