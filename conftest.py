collect_ignore = ["test_model.py"]  # a script for users whose name looks like a test
