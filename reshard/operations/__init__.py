"""What the package offers, one public function a file: plan, convert, merge, verify, inspect, pull, publish.

Each checks its arguments, and calls the rooms below. The command line and Python users call the same functions.
"""
