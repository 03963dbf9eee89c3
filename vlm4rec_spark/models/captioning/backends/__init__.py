"""One file per captioning backend. All follow the protocol of captioner.py."""
