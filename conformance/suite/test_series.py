from conformance.checks import series
from conformance.suite.properties import as_test

test_everything = as_test(series.everything)
