"""The command line: arguments, output, exit codes. Nothing heavy is imported until a command runs."""
