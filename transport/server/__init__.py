"""The accepting side: listener, handshake and sessions."""
