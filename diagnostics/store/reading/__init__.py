"""How a run is read: what is asked, which files have it, which attempt counts, what is new."""
