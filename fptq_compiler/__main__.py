"""`python -m fptq_compiler` is `fptq-compile`."""

from fptq_compiler.cli.compile import main

main()
