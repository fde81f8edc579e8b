"""Children that are killed, and the oracle that counts what is left."""
