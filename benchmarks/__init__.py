"""Measurements of speed and memory; results/ holds the figures that the documentation shows."""
