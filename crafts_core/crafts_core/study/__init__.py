"""A blinded reader study: pathologists tell real images from synthetic ones, on a local page.

``creation`` puts images, readers and their orders into one SQLite file, ``reading_app`` shows them
to readers, ``analysis`` says what the answers mean.
"""
