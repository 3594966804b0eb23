{{- define "trivec.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{- define "trivec.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "trivec.labels" -}}
{{ include "trivec.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "trivec.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* One environment variable from a Secret: (list NAME SECRET KEY). */ -}}
{{- define "trivec.fromSecret" -}}
- name: {{ index . 0 }}
  valueFrom:
    secretKeyRef: {name: {{ index . 1 | quote }}, key: {{ index . 2 | quote }}}
{{- end }}

{{- define "trivec.env" -}}
- {name: TRIVEC_DEVICE, value: {{ ternary "cpu" "cuda" (eq .Values.device "cpu") }}}
{{- range $name, $value := .Values.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- define "trivec.databaseUrl" -}}
{{ include "trivec.fromSecret" (list "TRIVEC_DATABASE_URL" (.Values.database.secretName | default .Values.secret.name) .Values.database.urlKey) }}
{{- end }}

{{- define "trivec.dataVolume" -}}
- name: data
  {{- if .Values.persistence.enabled }}
  persistentVolumeClaim: {claimName: {{ .Values.persistence.existingClaim | default (include "trivec.name" .) }}}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}

{{- /* What the PromQL of an autoscaler selects: what the ServiceMonitor scrapes of this release. */ -}}
{{- define "trivec.series" -}}
{namespace="{{ .Release.Namespace }}",service="{{ include "trivec.name" . }}-metrics"}
{{- end }}
