{{- /* On every object, so that what belongs to the mesh can be told: in braces, to stand on one line. */ -}}
{{- define "labels" -}}
app.kubernetes.io/name: nodemesh, app.kubernetes.io/part-of: nodemesh, app.kubernetes.io/version: {{ toJson .Chart.AppVersion }}
{{- end -}}
{{- define "image" -}}
"{{ .Values.image.repository }}:{{ or .Values.image.tag .Chart.AppVersion }}"
{{- end -}}
{{- define "pullSecrets" -}}
[{{ range .Values.image.pullSecrets }}{name: {{ toJson . }}},{{ end }}]
{{- end -}}
