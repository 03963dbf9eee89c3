"""Tables and files: the schemas, the only Delta code, the lease, the folders of the index."""
