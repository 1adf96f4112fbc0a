"""What is not in part files yet: survives a kill, is read by everybody, and is settled by whoever comes next."""
