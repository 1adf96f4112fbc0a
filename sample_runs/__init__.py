"""Runs that come with the repository, and what makes and judges them; no part of the wheel."""
