"""Photos: where they lie, how they are downloaded and decoded."""
