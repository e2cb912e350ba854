"""Small helpers without LoRA in them: errors, safe files, trees, fingerprints, matrix products.

Imports nothing of the package.
"""
