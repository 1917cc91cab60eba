"""`seraph doctor`: what could keep Seraph from working on this machine, and what to do about it.

One module for each section of the report; `report` runs them, bounded in time and apart from each other.
"""
