"""The protocol, the engine and the meaning of masks."""
