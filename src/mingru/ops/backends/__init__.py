"""The backends, one module each. Each defines BACKEND, an `ops.backend.Backend`."""
