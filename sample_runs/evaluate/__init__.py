"""The proof: how early the detectors warn and how often they are wrong, from the committed tables (`make evaluate`)."""
