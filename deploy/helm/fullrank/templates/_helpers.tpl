{{- define "fullrank.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end -}}
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

{{- /* A probe of values.probes on the service's own port. */ -}}
{{- define "fullrank.probe" -}}
httpGet: {path: {{ .path }}, port: http}
periodSeconds: {{ .periodSeconds }}
failureThreshold: {{ .failureThreshold }}
timeoutSeconds: {{ .timeoutSeconds }}
{{- end }}

{{- define "fullrank.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: state, mountPath: /state}
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
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
  securityContext:
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    runAsNonRoot: true
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
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
        - {name: FULLRANK_HOST, value: "0.0.0.0"}
        - {name: FULLRANK_PORT, value: "8000"}
        - {name: FULLRANK_STATE_DIR, value: /state}
        {{- with .Values.encoder.path }}
        - {name: FULLRANK_ENCODER, value: {{ . | quote }}}
        {{- end }}
        {{- if .Values.encoder.existingClaim }}
        - {name: FULLRANK_ENCODERS_DIR, value: /encoders}
        {{- end }}
        {{- if .Values.gpu.enabled }}
        - {name: FULLRANK_DEVICE, value: cuda}
        {{- end }}
        {{- range $name, $value := .Values.settings }}
        - {name: FULLRANK_{{ upper $name }}, value: {{ $value | toString | quote }}}
        {{- end }}
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
        {{- include "fullrank.mounts" . | nindent 8 }}
  volumes:
    {{- include "fullrank.volumes" . | nindent 4 }}
    {{- if not .Values.persistence.enabled }}
    - {name: state, emptyDir: {}}
    {{- end }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
  {{- with index $.Values $key }}
  {{ $key }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
{{- end }}
