{{/* SPDX-License-Identifier: Apache-2.0; the comments stand in deploy/base. */ -}}
{{- define "ebpf-router.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
