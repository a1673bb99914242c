"""Models with an explicit memory."""
