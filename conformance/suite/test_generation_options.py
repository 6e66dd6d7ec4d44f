from conformance.checks import generation_options
from conformance.suite.properties import as_test

test_options = as_test(generation_options.options)
test_stream = as_test(generation_options.stream)
test_cache_of_activations = as_test(generation_options.cache_of_activations)
