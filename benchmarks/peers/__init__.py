"""Do the same work with other libraries."""
