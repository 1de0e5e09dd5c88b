"""What client and server send each other: observations, action chunks, images."""
