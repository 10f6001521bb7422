"""One module for each backend; `route.Backend` says what a backend states of itself."""
