from conformance.checks import generation
from conformance.suite.properties import as_test

test_greedy = as_test(generation.greedy)
test_embeddings = as_test(generation.embeddings)
