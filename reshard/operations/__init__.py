"""The public functions, one a file: plan, convert, merge, verify, inspect, pull, publish.

Each checks its arguments, then calls the packages below. The command line and Python users call the same functions.
"""
