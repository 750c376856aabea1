"""The models of a node: those that lie on its disk, and those that have to be fetched first.

``source`` says what a source is, and ``local``, ``mirror``, ``web`` and ``hub`` are the ones there are; ``choice``
picks a file of a repository; ``fetching`` brings one model into the store, whole and checked or not at all; ``store``
knows which models are here, fetches those that are not, and says how far it is.
"""
