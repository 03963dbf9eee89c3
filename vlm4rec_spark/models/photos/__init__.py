"""Photos: how they are stored, downloaded and decoded."""
