"""The sliced pipeline on the devices: executor, stages, and the embedding and head, divided among
all stages.
"""
