"""The corpus: small training runs with known ends, on which the detectors are calibrated and judged."""
