"""The server's side: listener, handshake and sessions."""
