"""Robot drivers behind one interface."""
