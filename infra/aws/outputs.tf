output "bucket" {
  value = "s3://${aws_s3_bucket.this.id}"
}

output "role_arn" {
  description = "For both service accounts in cluster/kuberay/platform/accounts.yaml."
  value       = aws_iam_role.bucket.arn
}

output "instance_profiles" {
  description = "Of head and workers in cluster/aws.yaml."
  value       = [aws_iam_instance_profile.launcher.name, aws_iam_instance_profile.node_bucket.name]
}

output "kubeconfig" {
  value = "aws eks update-kubeconfig --region ${var.region} --name ${aws_eks_cluster.this.name}"
}
