"""One file per captioning backend, behind the protocol of captioner.py."""
