"""The networks and the classical engine, behind protocols by role."""
