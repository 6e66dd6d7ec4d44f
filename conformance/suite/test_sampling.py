from conformance.checks import sampling
from conformance.suite.properties import as_test

test_draws = as_test(sampling.draws)
test_hugging_face = as_test(sampling.hugging_face)
