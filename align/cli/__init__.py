"""The command `align`: one file per verb. Verbs parse, call, print, and turn outcomes into exit codes."""
