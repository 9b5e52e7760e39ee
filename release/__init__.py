"""What releases are made with: ``make wheel`` and ``make wheel-check``."""
