"""The report: `tables` has the numbers, `figures` the pictures, `page` the page around them.

Everything takes plain data, and nothing here reads a config or an artefact.
"""
