// Renders templates as Ollama does: {"Template", "System", "Messages"} in JSON lines in, the text in JSON lines out.
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type request struct {
	Template, System string
	Messages         []*message
}

func main() {
	lines := bufio.NewReader(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	decoder := json.NewDecoder(lines)
	for decoder.More() {
		var asked request
		if err := decoder.Decode(&asked); err != nil {
			panic(err)
		}
		parsed, err := template.New("").Option("missingkey=zero").Parse(asked.Template)
		if err != nil {
			panic(err)
		}
		var text strings.Builder
		values := map[string]any{"System": asked.System, "Messages": asked.Messages, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		out.Encode(text.String())
	}
}
