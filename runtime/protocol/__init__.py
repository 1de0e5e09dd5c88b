"""The messages between client and server: observations, action chunks, errors, images."""
