{{- /* At most 52 characters: a StatefulSet's pods carry its name and a hash in a label of 63. */ -}}
{{- define "fullrank.name" -}}
{{- $name := .Release.Name }}
{{- if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" (.Release.Name | trunc 43 | trimSuffix "-") .Chart.Name }}{{ end -}}
{{ $name | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "fullrank.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "fullrank.labels" -}}
{{ include "fullrank.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* The Prometheus job: one for each release, so that two releases are not one service to the alerts. */ -}}
{{- define "fullrank.job" -}}
{{ .Release.Namespace }}/{{ .Release.Name }}/fullrank
{{- end }}

{{- define "fullrank.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "fullrank.account" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "fullrank.name" .) }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end -}}
{{- end }}

{{- define "fullrank.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* A setting as the service reads it. Helm reads numbers of a file as floats, and would write 67108864 as 6.7108864e+07. */ -}}
{{- define "fullrank.text" -}}
{{- if kindIs "slice" . }}{{ range $index, $it := . }}{{ if $index }},{{ end }}{{ include "fullrank.text" $it }}{{ end }}
{{- else if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}
{{- else }}{{ . }}
{{- end }}
{{- end }}

{{- /* CPU threads of a forward pass: one less than the CPUs asked for, for the rest of the service. A pod without a CPU limit
sees all CPUs of its node, and would start a thread for each. Empty if the request does not say. */ -}}
{{- define "fullrank.threads" -}}
{{- $cpu := dig "requests" "cpu" "" .Values.resources | toString }}
{{- if hasSuffix "m" $cpu }}{{ max 1 (sub (div (trimSuffix "m" $cpu | int) 1000) 1) }}
{{- else if $cpu }}{{ max 1 (sub (floor (float64 $cpu) | int) 1) }}
{{- end }}
{{- end }}

{{- /* name: value of every plain variable; `settings` wins. */ -}}
{{- define "fullrank.variables" -}}
{{- $found := dict "host" "0.0.0.0" "port" "8000" "state_dir" "/state" }}
{{- with .Values.encoder.path }}{{ $_ := set $found "encoder" . }}{{ end }}
{{- if .Values.encoder.existingClaim }}{{ $_ := set $found "encoders_dir" "/encoders" }}{{ end }}
{{- if .Values.gpu.enabled }}{{ $_ := set $found "device" "cuda" }}{{ end }}
{{- with include "fullrank.threads" . }}
{{- $_ := set $found "threads" . }}
{{- $_ := set $found "decode_threads" (min 4 (int .) | toString) }}
{{- end }}
{{- range $name, $value := .Values.settings }}{{ $_ := set $found $name (include "fullrank.text" $value) }}{{ end }}
{{- range $name, $value := $found }}
- {name: FULLRANK_{{ upper $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- /* Seconds from SIGTERM to SIGKILL: readiness off, accepted requests answered, uvicorn's 5 s of grace, windows saved. */ -}}
{{- define "fullrank.grace" -}}
{{- $needed := add (ceil (float64 (dig "drain_seconds" 0 .Values.settings))) (ceil (float64 (dig "request_timeout" 30 .Values.settings))) 15 }}
{{- $given := int .Values.terminationGracePeriodSeconds }}
{{- if and $given (lt $given (int $needed)) }}
{{- fail (printf "terminationGracePeriodSeconds is %d; settings.drain_seconds and settings.request_timeout need %d, or accepted requests are killed: raise it, or leave it 0" $given (int $needed)) }}
{{- end }}
{{- $given | default $needed }}
{{- end }}

{{- /* A probe of values.probes on the service's own port. */ -}}
{{- define "fullrank.probe" -}}
httpGet: {path: {{ .path }}, port: http}
periodSeconds: {{ .periodSeconds }}
failureThreshold: {{ .failureThreshold }}
timeoutSeconds: {{ .timeoutSeconds }}
{{- end }}

{{- /* What the service and the gate both see. */ -}}
{{- define "fullrank.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if .Values.encoder.existingClaim }}
- {name: encoders, mountPath: /encoders, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "fullrank.volumes" -}}
- {name: tmp, emptyDir: {}}
{{- if .Values.encoder.existingClaim }}
- {name: encoders, persistentVolumeClaim: {claimName: {{ .Values.encoder.existingClaim }}, readOnly: true}}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Who a pod is and where it may run: the service's and the gate's. */ -}}
{{- define "fullrank.place" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $.Values $key }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "fullrank.pod" -}}
metadata:
  labels:
    {{- include "fullrank.selector" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "fullrank.account" . }}
  {{- include "fullrank.place" . | nindent 2 }}
  terminationGracePeriodSeconds: {{ include "fullrank.grace" . }}
  {{- with .Values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  containers:
    - name: fullrank
      image: {{ include "fullrank.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      securityContext:
        {{- include "fullrank.securityContext" . | nindent 8 }}
      ports:
        - {name: http, containerPort: 8000, protocol: TCP}
      env:
        {{- include "fullrank.variables" . | trim | nindent 8 }}
        {{- range .Values.secrets }}
        - name: {{ .variable }}
          valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
        {{- end }}
        {{- with .Values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      startupProbe:
        {{- include "fullrank.probe" .Values.probes.startup | nindent 8 }}
      readinessProbe:
        {{- include "fullrank.probe" .Values.probes.readiness | nindent 8 }}
      livenessProbe:
        {{- include "fullrank.probe" .Values.probes.liveness | nindent 8 }}
      resources:
        {{- $resources := deepCopy .Values.resources }}
        {{- if .Values.gpu.enabled }}
        {{- $limits := merge (dict .Values.gpu.resource (.Values.gpu.count | toString)) ($resources.limits | default dict) }}
        {{- $_ := set $resources "limits" $limits }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        - {name: state, mountPath: /state}
        {{- include "fullrank.mounts" . | nindent 8 }}
  volumes:
    {{- include "fullrank.volumes" . | nindent 4 }}
    {{- if not .Values.persistence.enabled }}
    - {name: state, emptyDir: {}}
    {{- end }}
  {{- with .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - {{- toYaml (hasKey . "labelSelector" | ternary . (merge (dict "labelSelector" (dict "matchLabels" (include "fullrank.selector" $ | fromYaml))) .)) | nindent 6 }}
    {{- end }}
  {{- end }}
{{- end }}
