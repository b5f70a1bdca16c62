"""The report: one typed document of a deployment, and its HTML, Markdown and JSON forms.

``build`` makes the document from plans, ``render`` writes it; nothing in a template computes.
"""
