"""ZeroMQ over TCP: sockets, encryption and the channel over them."""
