{{- define "interpretops.labels" -}}
app.kubernetes.io/name: interpretops
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "interpretops.meta" -}}
name: {{ .root.Release.Name }}-{{ .component }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "interpretops.labels" . | nindent 2 }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end -}}

{{- define "interpretops.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "interpretops.pod" -}}
# Kubernetes would set INTERPRETOPS_GATEWAY_PORT and its like for our own Services, and those are our settings.
enableServiceLinks: false
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "interpretops.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{- /* What the chart decides of the gateway's settings, and over it what `config` says. */ -}}
{{- define "interpretops.settings" -}}
gateway:
  host: 0.0.0.0
  admin_host: 0.0.0.0
  {{- if .Values.gateway.tlsSecret }}
  tls_cert: /etc/interpretops/tls/tls.crt
  tls_key: /etc/interpretops/tls/tls.key
  {{- end }}
engine:
  # All addresses of the headless Service: every engine, asked for again every few seconds.
  url: dns+http://{{ .Release.Name }}-engine:8100
paths:
  keys: /etc/interpretops/keys/keys.yaml
  {{- if eq .Values.policies.source "objectStorage" }}
  policies: /var/cache/interpretops/bucket/policies
  artifacts: /var/cache/interpretops/bucket/sae_artifacts
  {{- else }}
  policies: /srv/interpretops/policies
  artifacts: /srv/interpretops/sae_artifacts
  {{- end }}
  state: /var/lib/interpretops/state
audit:
  path: /var/lib/interpretops/audit/gateway.jsonl
{{- end -}}
