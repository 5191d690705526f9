"""What the operator decides. Nothing here opens a connection, and importing it has no effect."""
