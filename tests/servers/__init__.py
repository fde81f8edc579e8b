"""Real servers for tests: each starts when first asked for, on 127.0.0.1, and ends with the session."""
