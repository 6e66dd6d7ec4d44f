"""olmo-conformance: is what a researcher sees through the bridge what the model computes?"""
